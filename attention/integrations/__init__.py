"""HSR attention in other people's models: `transformers` in one line, any torch module within a context."""
