"""Networks for other programs: folded batch norms, StableHLO, ONNX and SavedModel, NNX."""
