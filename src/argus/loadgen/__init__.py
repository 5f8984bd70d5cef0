"""Sends load to a server and measures its answers: a client like vLLM-Omni's and SGLang's."""
