"""Every setting: its type, default, help line and option, and how one run's settings are read.

A pipeline file, environment variables and options come in; one frozen `RunConfig` goes out. This package imports only
`errors` and `escape`: it opens neither data nor models.
"""
