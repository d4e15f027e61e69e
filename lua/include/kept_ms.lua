-- How long an answer is kept for a call that is sent again: a minute, longer than any client retries.
local kept_ms = '60000'
