"""`make bench-peers`: llama.cpp, onnxruntime-genai and OpenVINO GenAI beside us, with the same weights, in one run."""
