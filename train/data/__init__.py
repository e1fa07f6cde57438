"""Training data: sources, loader, augmentation."""
