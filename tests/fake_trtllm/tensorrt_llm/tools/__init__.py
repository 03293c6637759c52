"""Fake tensorrt_llm.tools."""
