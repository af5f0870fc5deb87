"""Agents, models and data sets on the Hugging Face Hub: their addresses, their files and their cards."""
