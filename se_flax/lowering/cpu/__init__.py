"""Convolutions for a CPU, where XLA's own are slow: by shape, the form that was measured to be the fastest.

| convolution | forward | input's gradient | kernel's gradient |
|---|---|---|---|
| 1x1 | matrix product | likewise | likewise |
| depthwise | sum of shifted products | likewise | products summed over columns, then over the rest |
| grouped, of few channels a group | as depthwise, groups side by side | likewise | likewise |
| grouped | up to 32 dense ones, zeros between groups | likewise | likewise |
| dense, 3x3, of many channels | matrix products of transformed tiles (Winograd's) | likewise | likewise |
| dense | XLA's | XLA's; with a stride, product of patches | of patches and rows of the gradient; of small maps XLA's |
| dense, of a small map | matrix product of patches | as above | as above |
| dense, of up to three channels | sum of shifted products | as above | as above |

`benchmarks/convolution.py` measures them beside XLA's.
"""
