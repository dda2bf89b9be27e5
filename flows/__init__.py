"""Prefect: when and where the pipeline runs. The one package that meets Prefect; the library knows nothing of it."""
