"""Pictures before a network sees them: decoding, preprocessing, class folders, names of classes."""
