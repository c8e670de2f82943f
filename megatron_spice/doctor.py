def main(as_json): return 0
