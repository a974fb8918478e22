"""Our native code and llama.cpp, both restricted to fewer instructions than this processor has."""
