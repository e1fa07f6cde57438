"""Convolutions for a CPU, where XLA's own are slow: by shape, the form that was measured to be the fastest.

| convolution | forward | input's gradient | kernel's gradient |
|---|---|---|---|
| 1x1 | matrix product | likewise | likewise |
| depthwise | sum of shifted products | likewise | products summed over images, then over pixels |
| grouped, of few channels a group | sum of shifted products, groups side by side | likewise | as in the next line |
| grouped | up to 32 dense ones, in training 16, zeros between groups | likewise | likewise |
| dense, 3x3, of many channels | matrix products of transformed tiles (Winograd's) | likewise | likewise |
| dense | XLA's | XLA's; with a stride, product of patches | product of patches and rows of the gradient |
| dense, of a small map | matrix product of patches | as above | as above |
| dense, of up to three channels | sum of shifted products | as above | as above |

`benchmarks/convolution.py` measures them beside XLA's.
"""
