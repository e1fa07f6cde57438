"""What networks are made of.

- `conv`, `norm`, `pooling`: layers; `head`: the last one
- `norm_attention`: norm, activation and channel attention as one step, in the fewest passes over the map
- `branches`: attention over parallel branches
- `residual`, `mobile` (with `mobile_table`), `inception`: blocks
- `network`: the base class, which says where classifier, stem and blocks are
"""
