"""Tests of the image and the compose files, on a Docker engine of their own: python -m tests.docker."""
