"""The OpenAI API in front of the loop, and a page to look at it."""
