-- How long an answer is kept for a call that is sent again: a minute, longer than the managers go on sending it.
local kept_ms = '60000'
