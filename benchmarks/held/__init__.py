"""Our native code and llama.cpp, both held to fewer instructions than this processor has."""
