"""A run: plan, execute, finish, resume, merge, replay."""
