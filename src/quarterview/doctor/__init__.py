"""Is a run working?"""
