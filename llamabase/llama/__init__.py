"""llama.cpp and ggml: models, contexts, states, products of rows, timing."""
