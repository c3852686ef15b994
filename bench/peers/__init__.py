"""`make bench-peers`: llama.cpp, onnxruntime-genai and OpenVINO GenAI next to ours, with the same weights."""
