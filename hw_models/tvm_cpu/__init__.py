"""Low-bit kernels compiled with TVM, and what they measure on a real processor. Importing it doesn't import TVM."""
