"""Scenes that are generated: images, questions and answers for which nothing is downloaded."""
