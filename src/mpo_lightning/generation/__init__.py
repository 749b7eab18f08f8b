"""Text generation: from a model in this process, or from an OpenAI-compatible server."""
