"""Convolutions for a CPU, where XLA's own are slow: for each shape the implementation that was measured to be fastest.

| convolution | forward | input gradient | kernel gradient |
|---|---|---|---|
| 1x1 | matrix product | likewise | likewise |
| depthwise | sum of shifted products | likewise | products summed over columns, then over the rest |
| grouped, few channels per group | as depthwise, vectorised over the groups | likewise | likewise |
| grouped | up to 32 dense ones with block-diagonal kernels | likewise | likewise |
| dense, 3x3, many channels | Winograd F(2x2, 3x3) | likewise | likewise |
| dense | XLA's | XLA's; with a stride, im2col | im2col of rows; XLA's for small maps |
| dense, small map | im2col | as above | as above |
| dense, up to three channels | sum of shifted products | as above | as above |

`benchmarks/convolution.py` compares them with XLA's.
"""
