"""Alembic runs this file for every command that needs a database. All there is to know is in `car_control_plane.migrations`."""

from alembic import context

from car_control_plane.migrations import run_environment

run_environment(context)
