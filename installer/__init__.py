"""Parts of install.sh: shell to be sourced, and Python for what that cannot say well."""
