"""Vocabulary of qflow: a model and a choice of precisions as data. Standard library only."""
