-- How long an answer is kept for a call that is sent again: a minute, longer than the managers send one again.
local kept_ms = '60000'
