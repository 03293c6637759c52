.PHONY: quickstart test lint format

quickstart:
	launch/quickstart.sh

test:
	launch/test.sh

lint:
	launch/test.sh --lint

format:
	launch/test.sh --format
