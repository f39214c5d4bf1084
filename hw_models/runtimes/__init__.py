"""Layers as ONNX Runtime and OpenVINO run them, measured on this machine. Importing it imports neither of them."""
