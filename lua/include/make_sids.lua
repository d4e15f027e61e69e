-- Put a user's list of connections together; see split_sids.
local function make_sids(sids, kept)
  local list = ''
  for _, sid in ipairs(sids) do
    list = list .. #sid .. ':' .. sid
  end
  return kept == '' and list or list .. '=' .. kept
end
