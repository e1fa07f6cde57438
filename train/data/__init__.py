"""Where the images come from, and what happens to them: sources, loader, augmentation."""
