"""Shared by several test files: models, tables of cases, and what runs beside the tests."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
