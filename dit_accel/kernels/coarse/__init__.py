"""Attention among block means."""
