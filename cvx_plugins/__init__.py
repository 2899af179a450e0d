"""Built-in components, reached only through entry points, as third-party packages are."""
