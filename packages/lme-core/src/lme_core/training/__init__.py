"""Objectives, optimizers, schedules and the loop that trains a model."""
