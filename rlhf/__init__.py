"""Alignment: reward model, PPO, rejection sampling, preference losses."""
