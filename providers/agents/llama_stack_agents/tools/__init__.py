"""The tools that come with agents."""

__all__: list[str] = []
