"""Building blocks of the networks.

- `conv`, `norm`, `pooling`: layers; `head`: the classifier
- `attention_base`: base classes of channel attention
- `norm_attention`: norm, activation and channel attention as one step, in the fewest passes over the map
- `branches`: attention over parallel branches
- `residual`, `mobile` (with `mobile_table`), `inception`: blocks
- `network`: the base class, which declares the paths of classifier, stem and blocks
"""
