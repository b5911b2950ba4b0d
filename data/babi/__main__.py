"""The command line: python -m data.babi --help"""

from data.babi import main

if __name__ == "__main__":
    main()
