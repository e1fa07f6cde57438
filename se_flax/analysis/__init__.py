"""Analysis of networks: costs (`costs`), feature maps (`features`) and gates (`gates`)."""
