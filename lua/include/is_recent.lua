-- Tell whether the call whose answer is kept with a user's list (see split_sids) may be sent again: within a minute,
-- longer than any client retries. The answer begins with the time in us, of which these are the digits down to the ms.
local function is_recent(kept, now)
  return kept ~= '' and now - string.sub(kept, 17, 29) < 60000
end
