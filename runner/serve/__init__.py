"""OpenAI's API and llama-server's over HTTP, and a page."""
