"""Input of networks: decoding and preprocessing of images, class folders, names of classes."""
