"""python -m data.babi"""

from data.babi import main

if __name__ == "__main__":
    main()
