"""Training on tables: click prediction from categorical and numeric fields."""
