"""Text generation with a model in this process, or with an OpenAI-compatible server."""
