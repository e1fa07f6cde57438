"""Faster implementations of the same operations, chosen by platform, shape or sharding; networks do not depend on them.

- `convolution`: XLA's convolution (`xla`), or a faster implementation on a CPU (`cpu`)
- `gated_norm`: norm, activation and gate with a custom VJP, for blocks that squeeze after the activation
- `deferred_conv`: batch norm after a 1x1 convolution whose output is not stored (training on a TPU)
- `sharding`: arrays on explicit mesh axes
- `dispatch`: the choice by platform, which `dispatch.force` overrides in tests; memoised functions; arrays that XLA may
  not recompute
"""
