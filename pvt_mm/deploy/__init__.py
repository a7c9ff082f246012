"""ONNX, OpenVINO and PyTorch programs."""
