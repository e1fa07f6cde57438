"""The same numbers by another program, chosen by platform, shape or sharding. Networks do not know of it.

- `convolution`: XLA's convolution (`xla`), or on a CPU a faster form (`cpu`)
- `gated_norm`: norm, activation and gate with a derivative of its own, for blocks that squeeze after the activation
- `deferred_conv`: batch norm of a 1x1 convolution whose output is not stored (training on a TPU)
- `sharding`: arrays on explicit mesh axes
- `dispatch`: the choice by platform, which `dispatch.force` takes over in tests; memoised functions, arrays that are
  computed once
"""
