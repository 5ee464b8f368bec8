"""Evaluation: multiple choice, entities, open answers, attitude scales."""
