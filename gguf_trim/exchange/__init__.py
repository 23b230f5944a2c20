"""What other programs take and publish: lists of token ids, and EAGLE-3 checkpoints in safetensors."""
